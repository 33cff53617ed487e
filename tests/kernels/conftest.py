import pytest


@pytest.fixture(scope="session", autouse=True)
def kernel_cache(tmp_path_factory):
    """Generated sources go to a folder of the test session, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("falqon-cache")
        patch.setenv("FALQON_CACHE", str(folder))
        yield folder
