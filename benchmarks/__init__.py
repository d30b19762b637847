"""How fast llm_magic is, beside others and beside what the hardware allows: `python -m benchmarks`.

Protocol
--------
Every contender runs in a process of its own and loads its model once. Contenders of a group take
turns (A B A B …), so that a busy machine slows all of them alike; nobody else of the group works
meanwhile. The first round warms up and does not count. A number is the median of the rounds that do,
with the lowest and the highest; ratios are of medians of the same run. The load of the machine before
and after a group is noted.

Decode is tokens per second from the first token of an answer to the last, greedy, batch 1; prefill is
the tokens of the prompt by the seconds from its text, not yet tokenized, to the first token. Everything
runs offline, and what is measured of the machine lies in a cache of its own, unless ``LLM_MAGIC_CACHE`` names one.

"Warm": the files' pages were used before, so that the system serves them from RAM. "Cold": they are
dropped from the page cache before an answer and after each of its tokens, which is taken off the time.
"""
