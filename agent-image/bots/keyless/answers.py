"""What the keyless bot says: a small set of rules, in the manner of ELIZA. Pure and deterministic.

The rules look for words, not for sentences, since a recogniser seldom writes a sentence twice in the same way. The
answers are words that survive synthesis and recognition.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

OPENING_HOURS = "We are open from nine in the morning to five in the afternoon, Monday to Friday."
NAME = "My name is Joe. I am a voice agent, and I was waiting here for your call."
ABILITIES = "I can tell you our opening hours, our address and my name, and I can listen."
ADDRESS = "You find us at number ten, Garden Street, beside the old library."
WEATHER = "I know nothing about the weather, since I live in a cluster and have no window."
FEELING = "I am very well, thank you. And how are you?"
THANKS = "You are welcome. Is there anything else?"
GOODBYE = "Goodbye, and thank you for calling."
GREETING = "Hello! How can I help you?"
SILENCE = "I am sorry, I did not understand you. Could you say it again?"

RULES: Sequence[tuple[str, str]] = (
    (r"\b(open|opening|opens|close|closing|closes|hours)\b", OPENING_HOURS),
    (r"\b(weather|rain|raining|sunny|snow)\b", WEATHER),
    (r"\b(what|who)\b.*\b(your name|are you|you called)\b", NAME),
    (r"\b(what|how)\b.*\b(can|could|do) you (do|help|offer)\b", ABILITIES),
    (r"\b(where|address|location|street)\b", ADDRESS),
    (r"\bhow (are|do) you\b", FEELING),
    (r"\b(thanks|thank you)\b", THANKS),
    (r"\b(bye|goodbye|see you)\b", GOODBYE),
    (r"^(hello|hi|hey|good (morning|afternoon|evening))\b", GREETING),
)

REFLECTIONS = {
    "i": "you", "me": "you", "my": "your", "mine": "yours", "am": "are", "i'm": "you are", "i've": "you have",
    "you": "I", "your": "my", "yours": "mine", "you're": "I am",
}  # fmt: skip

MAX_ECHOED_WORDS = 12


def answer(heard: str) -> str:
    """What to say to what was heard; the first rule that fits, or what was heard, turned round."""
    words = re.findall(r"[a-z0-9']+", heard.lower())
    if not words:
        return SILENCE
    plain = " ".join(words)
    for pattern, words_to_say in RULES:
        if re.search(pattern, plain):
            return words_to_say
    reflected = " ".join(REFLECTIONS.get(word, word) for word in words[:MAX_ECHOED_WORDS])
    return f"You said: {reflected}. Tell me more."
