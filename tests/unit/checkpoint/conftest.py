"""Stores on loopback."""

import pytest
from checkpoint_fakes import make_step
from fake_stores import BUCKET, FakeStore


@pytest.fixture
def bucket(monkeypatch):
    """A store of both kinds, impatient clients, and leases of a moment."""
    from shardtrain.checkpoint import head, store, transfer

    server = FakeStore()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", server.url)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setattr(store, "RETRIES", {"max_retries": 1, "initial_delay": "1ms", "max_delay": "2ms"})
    monkeypatch.setattr(head, "LEASE", 0.2)
    monkeypatch.setattr(transfer, "LOOK", 0.01)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with steps 1 and 2; not to be changed."""
    path = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        make_step(path, step)
    return path


@pytest.fixture
def scheme():
    return "gs"


@pytest.fixture
def url(bucket, scheme):
    return f"{scheme}://{BUCKET}/run"
