"""Why vLLM's parsers go wrong where they do, as far as their sources and what comes out tell."""

_MARKUP_WHERE_CUT = "an unfinished call in a whole answer is given back as text"
_LLAMA = "text before a call is dropped from a whole answer, and hides the call in a stream"
_TAKEN_FOR_THOUGHT = "an answer without markers counts as reasoning, though the prompt opened no thought"
_UNENDED = (
    "after a prompt that opens the thought, one that doesn't end is text in a whole answer and reasoning in a stream"
)

REASONS = {
    "tool": {
        "hermes": _MARKUP_WHERE_CUT,
        "qwen3_json": _MARKUP_WHERE_CUT,
        "longcat": _MARKUP_WHERE_CUT,
        "granite4": _MARKUP_WHERE_CUT,
        "poolside_v1": _MARKUP_WHERE_CUT,
        "hy_v4": _MARKUP_WHERE_CUT,
        "dots": _MARKUP_WHERE_CUT,
        "pythonic": _MARKUP_WHERE_CUT,
        "llama4_pythonic": _MARKUP_WHERE_CUT,
        "lfm2": _MARKUP_WHERE_CUT,
        "k2_horizon": "an unfinished call is given back as text",
        "ernie45": "a reply in `<response>` ends a whole answer, so that calls after it are dropped",
        "granite": "its reasoning parser never tells that a thought has ended, so that calls after one stay text",
        "granite-20b-fc": "a stream finds calls only at the start of an answer",
        "hunyuan_a13b": "a stream finds calls only at the start of an answer, gives the opening marker away as text, "
        "and takes every `name` in nested arguments for a call",
        "gigachat3": _MARKUP_WHERE_CUT,
        "internlm": "an unfinished call in a whole answer raises",
        "jamba": "a stream searches the arguments for the newest piece, which garbles them",
        "llama3_json": _LLAMA,
        "llama4_json": _LLAMA,
        "phi4_mini_json": "its streaming method returns nothing: a stream is empty, whatever the model says; a call "
        "ends at the first `]`, and text before calls is dropped",
        "apertus": "the first half of a surrogate pair is streamed before the character that it becomes, and not taken "
        "back",
        "xlam": "a stream takes every `name` in nested arguments for a call; where the last piece has some of the "
        "arguments, the end of a stream gives them all once more",
        "mistral": "Mistral's own tokenizer breaks characters of several tokens where special tokens are kept, as the "
        "parser asks",
        "minicpm5": "text before a call is dropped from a whole answer",
        "step3": "lists and objects stay strings; " + _MARKUP_WHERE_CUT,
        "muse_glimmer": "without a reasoning parser the channel's header stays in a whole answer",
        "olmo3": _MARKUP_WHERE_CUT,
        "functiongemma": "arguments that are no strings are dropped, and nested ones taken apart",
    },
    "reasoning": {
        "ernie45": "once the thought has ended a stream no longer passes the parser, and `<response>` is left in",
        "granite": "it never tells that a thought has ended",
        "hunyuan_a13b": "once the thought has ended `</answer>` is left in",
        "inkling": "once the thought has ended a stream no longer passes the parser, and its markers are left in",
        "minimax_m2_append_think": "its partner drops the `</think>` that this parser means to leave in",
        "k2_horizon": _UNENDED,
        "olmo3": _UNENDED,
        "gemma4": _UNENDED,
        "qwen3": _TAKEN_FOR_THOUGHT,
        "kimi_k2": _TAKEN_FOR_THOUGHT,
        "deepseek_r1": _TAKEN_FOR_THOUGHT,
        "seed_oss": _TAKEN_FOR_THOUGHT,
        "cohere_command4": _TAKEN_FOR_THOUGHT,
        "muse_glimmer": "a stream waits for the header of a channel, and holds back an answer without one",
        "openai_gptoss": "an answer without a channel keeps the token that ends it",
    },
}
