"""x"""

NAME = "information_bottleneck"
SMALL = ("grid.seeds=2", "grid.samples=70", "training.max_steps=2", "data.train_size=256", "data.test_size=100", "grid.train_seeds=2")
CASES: list = []
