"""Upper bounds on everything a client can send, in one place; each is checked before any work is done."""

from __future__ import annotations

BODY_BYTES = 4 * 2**20
PROMPTS = 2048  # of one request: prompts, texts to embed, rows to answer
LISTED = 1000  # items that a recommendation lists
CHOICES = 2048  # prompts times n
CHARACTERS_PER_TOKEN = 64  # no text has more; one that would need it is too long before its tokens are counted
ROW_CHARACTERS = 2**18  # of a row to answer, its pictures left out
PIXELS = 64_000_000  # of all pictures of a request together
N = 128
MAX_TOKENS = 2**20
STOPS = 16
STOP_CHARACTERS = 512
LOGIT_BIAS = 1024
TOP_LOGPROBS = 20
MESSAGES = 4096
TOOLS = 128
CHOICE_TEXTS = 1024
PATTERN_CHARACTERS = 8192
NAME_CHARACTERS = 512
SCHEMA_BYTES = 2**16
HEADER_VALUE = 4096
