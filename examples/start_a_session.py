"""Starts a session, and prints what its caller needs: `GATEWAY=https://... KEY=... python start_a_session.py support-line`."""

import os
import sys

from voicepool.client import Voicepool

with Voicepool(os.environ["GATEWAY"], api_key=os.environ["KEY"]) as voicepool:
    session = voicepool.start(sys.argv[1], body={"name": "Ada"})
    print(session.session_id, session.url, session.token)
