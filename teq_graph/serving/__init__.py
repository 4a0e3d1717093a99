"""An exported model behind OpenAI's API: `teq-graph serve`. Needs the extra `teq-graph[serve]`."""
