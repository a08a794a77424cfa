"""The unmodified client of OpenAI: it creates, polls, downloads, lists and deletes."""

import io
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def client(place: Any) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url="http://127.0.0.1:8000/v1", http_client=place.client, max_retries=0)


def test_it_creates_polls_downloads_lists_and_deletes(place: Any, client: openai.OpenAI) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture, "PNG")
    with place.working():
        text = client.videos.create_and_poll(prompt="digit three", extra_body={"seed": 3, "guidance_scale": 2.5})
        reference: Any = ("first.png", picture.getvalue(), "image/png")
        given = client.videos.create(prompt="digit", input_reference=reference, extra_body={"num_inference_steps": 2})
        given = client.videos.poll(given.id)
    assert (text.status, given.status) == ("completed", "completed")
    assert (text.prompt, text.size, text.progress) == ("digit three", "8x8", 100)
    assert client.videos.download_content(text.id).read()[4:8] == b"ftyp"
    assert client.videos.download_content(text.id, variant="thumbnail").read()[8:12] == b"WEBP"
    assert [video.id for video in client.videos.list(limit=1)] == [given.id, text.id]  # it turns the pages
    assert client.videos.delete(text.id).deleted
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(text.id)
    with pytest.raises(openai.BadRequestError, match="unknown: nope") as caught:
        client.videos.create(prompt="digit", extra_body={"nope": 1})
    assert caught.value.code == "unknown_parameter"


def test_a_failed_job_ends_its_polling(place: Any, client: openai.OpenAI) -> None:
    job = place.ask()["id"]
    place.client.post(f"/v1/videos/{job}/cancel")
    found = client.videos.poll(job)
    assert found.status == "failed"
    assert found.error is not None
    assert found.error.code == "cancelled"
