"""Every parser of vLLM on written answers: no engine, no model; one import of vLLM, as the server does it."""

import regex._main

from common.vllm_env import prepare_environment

# vLLM compiles each of Mistral's thousand special tokens anew for each parser: twice as many as `regex` keeps.
regex._main._MAXCACHE = 5000

prepare_environment()
