"""A run that nothing disturbed, for tests that hold another against it."""

import shutil

import pytest

from tests.support import call


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """A folder with a run of the module's OPTIONS, and its corpus."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("train", [*request.module.OPTIONS, "run_dir=whole"], patch) == 0
    return folder


@pytest.fixture
def whole(finished, workplace):
    """A copy of that run, and of its corpus, in the folder to work in."""
    shutil.copytree(finished, workplace, dirs_exist_ok=True)
    return workplace / "whole"
