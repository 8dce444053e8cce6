"""`llama-server` as far as a job asks it, which misbehaves as `LLAMA_FAKE` says: `dies at once`, `dies at 9`."""

from __future__ import annotations

import os
import sys
import time

from tests.serving.fake_server import Fake

if "--version" in sys.argv:
    print("version: 7 (fake)")
    sys.exit()
how = os.environ.get("LLAMA_FAKE", "")
if how == "dies at once":
    print("no such architecture", flush=True)
    sys.exit(3)
words = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
fake = Fake(models=[words["--alias"]], port=int(words["--port"]), ids=False)
fake.start()
while not (how.startswith("dies at") and fake.streamed >= int(how.split()[-1])):
    time.sleep(0.002)
os._exit(4)
