"""Configurations and files for tests of training data."""

from PIL import Image

from ptattn.train import config as configs

CLASSES = {"caption_channels": None, "num_classes": 2}
TEXT = {"caption_channels": 256}


def make(source, model, size=(8, 12), channels=3, **settings):
    fields = dict(depth=1, dim=16, num_heads=1, in_channels=channels, out_channels=channels)
    return configs.parse(
        {
            "data": {"source": source, "size": list(size), **settings},
            "model": {**fields, **model},
            "steps": 4,
            "batch_size": 4,
        }
    )


def picture(path, size=(20, 10), mode="RGB", color=(255, 0, 0), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path
