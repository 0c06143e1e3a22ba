"""Tests that spawn run.sh and drive it over its socket, as the orchestrator does."""
