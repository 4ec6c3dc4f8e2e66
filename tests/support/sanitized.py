"""Every kernel once on tiny inputs, ragged everywhere: a program for compute-sanitizer."""

import torch

from ptattn import ops


def draw(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def differentiate(outs):
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [torch.randn_like(out) for out in outs])


def main():
    image = dict(grid=(7, 9), backend="triton")
    for window, shift in (((4, 3), (3, 1)), ((7, 9), (0, 0)), ((10, 12), (5, 6))):
        qkv = draw(1, 63, 3, 2, 72)
        differentiate(ops.packed_window_attention(qkv, window=window, shift=shift, **image))
    q, k, v = draw(1, 19 * 17, 3, 1, 72).unbind(2)  # windows of more than 64 tokens loop
    geometry = dict(grid=(19, 17), window=(9, 9), shift=(4, 4))
    differentiate(ops.window_attention(q, k, v, **geometry, backend="triton"))
    for keys in (7, 65, 129):
        q, kv = draw(2, 70, 1, 72), draw(2, keys, 2, 1, 72)
        mask = torch.rand(2, keys, device="cuda") < 0.5
        for key_mask in (None, mask):
            differentiate(ops.packed_attention(q, kv, key_mask=key_mask, backend="triton"))
    for run in (ops.window_mean, ops.layer_norm_window_mean):
        for window in ((4, 3), (7, 9)):
            differentiate(run(draw(2, 63, 72), window=window, **image))
    torch.cuda.synchronize()
    print("all kernels ran")


if __name__ == "__main__":
    main()
