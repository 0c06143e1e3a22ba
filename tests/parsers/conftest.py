"""Every parser of vLLM on written answers: no engine, no model; one import of vLLM, as the server does it."""

from common.vllm_env import prepare_environment

prepare_environment()
