"""Pictures, videos and sounds, made on the spot."""

import io
import math
import struct
import tempfile
import wave
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

RATE = 16_000


def video(shades: Sequence[int], size: tuple[int, int] = (32, 32), codec: str = "MJPG", suffix: str = "avi") -> bytes:
    """A video of five frames a second, one for each shade of grey."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"a.{suffix}")
        writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*codec), 5, size)
        for shade in shades:
            writer.write(np.full((size[1], size[0], 3), shade, np.uint8))
        writer.release()
        return file.read_bytes()


def sound(seconds: float, *, hertz: float = 440, rate: int = RATE) -> bytes:
    """A WAV of one tone: one channel of 16 bits."""
    count = round(seconds * rate)
    tone = (round(8000 * math.sin(2 * math.pi * hertz * index / rate)) for index in range(count))
    file = io.BytesIO()
    with wave.open(file, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(rate)
        writer.writeframes(struct.pack(f"<{count}h", *tone))
    return file.getvalue()


def picture(colour: str, size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()
