"""The image sets of the suite: sizes, files and their published hashes.

Imports nothing heavy, so that a configuration is checked against it at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One image set as its authors published it.

    Attributes:
        name: the set's name in the configuration.
        train_size: the number of training images.
        test_size: the number of test images.
        classes: the number of classes.
        shape: (channels, height, width) of an image.
        archives: the files that a mirror offers, with the folder under the root that each is unpacked in.
        files: the unpacked files, by path under the data root, with "algorithm:hash" of each.
        note: authors, year and licence.
    """

    name: str
    train_size: int
    test_size: int
    classes: int
    shape: tuple[int, int, int]
    archives: Mapping[str, str]
    files: Mapping[str, str]
    note: str


_IDX = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")

_SOURCES = (
    Source(
        name="mnist",
        train_size=60_000,
        test_size=10_000,
        classes=10,
        shape=(1, 28, 28),
        archives=dict.fromkeys(_IDX, "MNIST/raw"),
        files={
            "MNIST/raw/train-images-idx3-ubyte": "sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "MNIST/raw/train-labels-idx1-ubyte": "sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "MNIST/raw/t10k-images-idx3-ubyte": "sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "MNIST/raw/t10k-labels-idx1-ubyte": "sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
        note="LeCun, Cortes and Burges 1998; CC BY-SA 3.0",
    ),
    Source(
        name="fashion_mnist",
        train_size=60_000,
        test_size=10_000,
        classes=10,
        shape=(1, 28, 28),
        archives=dict.fromkeys(_IDX, "FashionMNIST/raw"),
        files={
            "FashionMNIST/raw/train-images-idx3-ubyte": "sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "FashionMNIST/raw/train-labels-idx1-ubyte": "sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "FashionMNIST/raw/t10k-images-idx3-ubyte": "sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "FashionMNIST/raw/t10k-labels-idx1-ubyte": "sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        note="Xiao, Rasul and Vollgraf 2017; MIT",
    ),
    Source(
        name="cifar10",
        train_size=50_000,
        test_size=10_000,
        classes=10,
        shape=(3, 32, 32),
        archives={"cifar-10-python.tar.gz": "."},
        files={
            "cifar-10-batches-py/data_batch_1": "md5:c99cafc152244af753f735de768cd75f",
            "cifar-10-batches-py/data_batch_2": "md5:d4bba439e000b95fd0a9bffe97cbabec",
            "cifar-10-batches-py/data_batch_3": "md5:54ebc095f3ab1f0389bbae665268c751",
            "cifar-10-batches-py/data_batch_4": "md5:634d18415352ddfa80567beed471001a",
            "cifar-10-batches-py/data_batch_5": "md5:482c414d41f54cd18b22e5b47cb7c3cb",
            "cifar-10-batches-py/test_batch": "md5:40351d587109b95175f43aff81a1287e",
            "cifar-10-batches-py/batches.meta": "md5:5ff9c542aee3614f3951f8cda6e48888",
        },
        note="Krizhevsky 2009; no licence stated",
    ),
    Source(
        name="cifar100",
        train_size=50_000,
        test_size=10_000,
        classes=100,
        shape=(3, 32, 32),
        archives={"cifar-100-python.tar.gz": "."},
        files={
            "cifar-100-python/train": "md5:16019d7e3df5f24257cddd939b257f8d",
            "cifar-100-python/test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc",
            "cifar-100-python/meta": "md5:7973b15100ade9c7d40fb424638fde48",
        },
        note="Krizhevsky 2009; no licence stated",
    ),
    Source(
        name="digits",
        train_size=1437,
        test_size=360,
        classes=10,
        shape=(1, 8, 8),
        archives={},
        files={},
        note="Alpaydin and Kaynak 1998, the test part as bundled with scikit-learn; CC BY 4.0",
    ),
)

CATALOGUE: dict[str, Source] = {source.name: source for source in _SOURCES}
