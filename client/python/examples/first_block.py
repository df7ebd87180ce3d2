"""Store a block, find it, read it where it lies. Needs a running daemon: ``kv-local up``, or ``kvd``."""

import sys

import kvd

client = kvd.connect(sys.argv[1] if len(sys.argv) > 1 else None)
session = client.session("first block")
scope = kvd.Scope("llama-3-8b", block_tokens=16, dtype="bf16")
binding = session.register(scope, block_bytes=64 << 10, slice=kvd.Slice(32, 8))

prompt = [b"hash of tokens %d" % n for n in range(3)]  # the engine's own block hashes
session.put(binding, prompt[0], bytes(64 << 10))
if room := session.reserve(binding, prompt[1]):
    room.write(b"\x01" * len(room))
    room.commit()

found = session.lookup(binding, prompt)
print(found.prefix, "of", len(prompt), "blocks are here; the next one:", found.miss)
for block in session.acquire(binding, prompt, wait=1.0):
    print(memoryview(block)[:4].tobytes() if block else f"recompute: {block.reason}")
