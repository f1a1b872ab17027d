import pytest


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
