"""vLLM is imported in the environment that the server gives it."""

from common.vllm_env import prepare_environment

prepare_environment()
