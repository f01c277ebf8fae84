"""The agent: a host process around an ordinary Pipecat bot, which it parks until there is a session for it."""
