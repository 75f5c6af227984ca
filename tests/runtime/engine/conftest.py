"""A model for the engine's tests."""

from pathlib import Path

import pytest
from many import Alone, hear, letters

from runtime.engine.engine import Engine
from runtime.prepared import prepare_session
from runtime.reading.opening import open_source
from runtime.session import Session, load_session


@pytest.fixture(scope="session", params=["reference", "max"])
def tiny_session(tiny: Path, request: pytest.FixtureRequest) -> Session:
    """On both paths: each sequence alone, and steps of many sequences on the kernels."""
    prepared = prepare_session(open_source(tiny, model=None), device_map={}, needs_text=False)
    session = load_session(prepared, speed=request.param)
    assert session.chain.reason is None
    return session


@pytest.fixture(scope="session")
def alone(tiny_session: Session) -> Alone:
    """What becomes of a request that has the model to itself."""
    return lambda request: hear(Engine(tiny_session, decode=letters), request)[0]
