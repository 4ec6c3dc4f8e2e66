"""`ptattn bench`: operations, blocks and models, each checked before it is timed."""
