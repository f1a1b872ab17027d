import pytest
import torch


@pytest.fixture(autouse=True)
def new_graphs():
    """A module's code is only compiled for eight models in a row."""
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """The layers that ran fused."""
    import sparsenlp.layers.encoder as layers

    seen, call = [], layers.call

    def counted(*arguments):
        seen.append(arguments)
        return call(*arguments)

    monkeypatch.setattr(layers, "call", counted)
    return seen
