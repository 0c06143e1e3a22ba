"""Everything that knows vLLM and the messages of the wire, and nothing of servers or processes."""
