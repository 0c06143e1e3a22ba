"""Bytes, frames and messages that nobody should send, against a server with an engine."""
