"""What media begin like: the kinds that are known, and the formats that FFmpeg may take them for."""

import io
import re

from common.errors import InvalidRequest

# The first that fits counts.
_MAGIC = {
    "image/png": rb"\x89PNG\r\n\x1a\n",
    "image/jpeg": rb"\xff\xd8\xff",
    "image/gif": rb"GIF8",
    "image/webp": rb"RIFF....WEBP",
    "image/bmp": rb"BM",
    "image/tiff": rb"II\*\0|MM\0\*",
    "image/avif": rb"....ftypavif",
    "image/heic": rb"....ftyp(heic|heix|mif1)",
    "video/mp4": rb"....(ftyp|mdat)|\0...(moov|wide|free|skip|pnot)",
    "video/webm": rb"\x1a\x45\xdf\xa3",
    "video/x-msvideo": rb"RIFF....AVI ",
    "video/x-ms-asf": rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
    "video/x-flv": rb"FLV\x01",
    "video/mpeg": rb"\0\0\x01[\xb3\xba]",
    "video/mp2t": rb"G.{187}G.{187}G|.{4}G.{191}G.{191}G",
    "audio/wav": rb"(RIFF|RF64|BW64)....WAVE|riff\x2e\x91\xcf\x11",
    "audio/ogg": rb"OggS",
    "audio/flac": rb"fLaC",
    "audio/mpeg": rb"ID3|\xff[\xe2\xe3\xf2-\xf5\xfa-\xfd]",
    "audio/aac": rb"\xff[\xf0\xf1\xf8\xf9]",
    "audio/aiff": rb"FORM....AIF[FC]",
    "audio/x-caf": rb"caff\0\x01",
    "audio/amr": rb"#!AMR",
    "audio/basic": rb"\.snd",
    "audio/ac3": rb"\x0b\x77",
    "audio/x-wavpack": rb"wvpk",
    "audio/x-ape": rb"MAC ",
    "application/pdf": rb"%PDF-",
    "application/zip": rb"PK\x03\x04",
}
# What can be pictures that move, besides videos. Any video can be a sound.
_MOVING = ("audio/ogg", "image/gif")
# FFmpeg's names for those of these kinds that are sounds or videos. It looks for formats anywhere in a file;
# others, which are text, name files and hosts for it to open, or have it listen: ffconcat, SDP, playlists.
FFMPEG_FORMATS = (
    "mov,matroska,avi,asf,flv,mpeg,mpegvideo,mpegts,wav,w64,ogg,flac,mp3,aac,aiff,caf,amr,au,ac3,eac3,wv,ape,gif"
)


def sniff(data: bytes) -> str | None:
    """The media type that `data` begins like."""
    return next((kind for kind, magic in _MAGIC.items() if re.match(magic, data, re.DOTALL)), None)


def fits(kind: str, modality: str) -> bool:
    """Whether a file of the media type `kind` can be of `modality`."""
    return (
        kind.startswith(modality)
        or (modality == "audio" and kind.startswith("video"))
        or (modality == "video" and kind in _MOVING)
    )


def check_kind(where: str, data: bytes, modality: str) -> None:
    """Keep from FFmpeg what does not begin like a sound, or a video.

    Raises:
        InvalidRequest: it doesn't.

    """
    kind = sniff(data)
    if kind is None or not fits(kind, modality):
        raise InvalidRequest(where, f"can't be decoded; it may be damaged, or is no {modality} of a known kind")


def check_format(where: str, data: bytes) -> None:
    """Keep from FFmpeg, behind PyAV, what it would take for something else than it begins like.

    Raises:
        InvalidRequest: it would.
        ImportError: there is no PyAV.

    """
    import av

    try:
        av.open(io.BytesIO(data), options={"format_whitelist": FFMPEG_FORMATS}).close()
    except av.ArgumentError:  # what FFmpeg says of a format that is not in the list
        raise InvalidRequest(where, "can't be decoded; it may be damaged, or is no audio of a known kind") from None
    except av.FFmpegError:
        return  # damaged: whoever decodes it will say so
