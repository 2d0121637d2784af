"""Guard a service.

One endpoint that compresses strangers' pictures with an encoder that nobody has to trust. With `pip install '.[web]'`,
and the picture that examples/poison_photo.py writes:

    uvicorn --app-dir examples guard_service:app
    curl --data-binary @poisoned.png --dump-header - --output sent.fqd http://127.0.0.1:8000/compress

Answers with the file that any freqdoor decodes, and says in a header what was decided:

    x-guard: stopped: 50.8 times the bytes that JPEG lets expect; sent through Jpeg(quality=50), 12664 bytes

A picture that cannot be used gets the command line's sentence and status 422, a large one status 413.
"""

import tempfile
from pathlib import Path
from threading import Lock
from typing import Annotated

from fastapi import Body, FastAPI, HTTPException, Response

import freqdoor

LARGEST = 32 * 2**20  # bytes of an upload
app = FastAPI()
codec = freqdoor.load_planted("planted-bpp").tampered  # an encoder of unknown origin
one_at_a_time = Lock()  # each picture takes all cores


@app.post("/compress")
def compress(picture: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Response:
    """The compressed picture, or one that was made harmless first."""
    if len(picture) > LARGEST:
        raise HTTPException(413, f"expected a picture of at most {LARGEST} bytes, found {len(picture)}")
    with tempfile.TemporaryDirectory() as folder, one_at_a_time:
        upload, file = Path(folder, "picture.png"), Path(folder, "picture.fqd")
        upload.write_bytes(picture)
        try:
            guarded = freqdoor.compress(upload, file, codec, guard=True)
        except freqdoor.FreqdoorError as error:
            raise HTTPException(422, str(error).replace(f"{folder}/", "")) from None
        return Response(file.read_bytes(), headers={"x-guard": guarded.outcome.reason})
