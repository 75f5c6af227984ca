"""One server for most tests of serving."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import Server, copy_with_template, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, shipped: Path) -> Iterator[Server]:
    """The shipped checkpoint on four slots."""
    folder = tmp_path_factory.mktemp("served")
    model = copy_with_template(shipped, folder / "python-llama")
    with serving(model, folder / "out", "--slots", 4) as found:
        yield found
