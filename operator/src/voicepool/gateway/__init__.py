"""The gateway: binds warm pods to callers, hands out tokens, and answers for sessions."""
