"""x"""

NAME = "rank_bottleneck"
SMALL = ("grid.seeds=2", "grid.samples=3", "training.max_steps=3", "data.train_size=256", "data.test_size=100")
CASES: list = []
