"""Speech out of text, by espeak-ng."""

import ctypes
import functools
from typing import Any

import espeakng_loader
import numpy as np
import numpy.typing as npt
import soxr

RATE = 16_000
# Of espeak-ng's speak_lib.h: AUDIO_OUTPUT_SYNCHRONOUS, POS_CHARACTER, espeakCHARS_UTF8.
_SYNCHRONOUS, _CHARACTERS, _UTF8 = 2, 1, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def say(text: str, voice: str = "en") -> npt.NDArray[np.float32]:
    """`text` as a voice of espeak-ng ("en", "de", ...) reads it: one channel, 16 kHz, between -1 and 1."""
    library, rate = _library()
    pieces: list[npt.NDArray[np.int16]] = []

    def keep(samples: Any, count: int, _events: Any) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _CALLBACK(keep)
    library.espeak_SetSynthCallback(callback)
    words = text.encode()
    if library.espeak_SetVoiceByName(voice.encode()):
        msg = f"espeak-ng has no voice {voice!r}"
        raise ValueError(msg)
    library.espeak_Synth(words, len(words) + 1, 0, _CHARACTERS, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    sound: npt.NDArray[np.float32] = np.concatenate(pieces).astype(np.float32) / np.float32(2**15)
    return np.asarray(soxr.resample(sound, rate, RATE), np.float32)


@functools.cache
def _library() -> tuple[ctypes.CDLL, int]:
    """The library, and the sample rate that it speaks in."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
    if rate <= 0:
        msg = "espeak-ng finds no voices"
        raise RuntimeError(msg)
    return library, rate
