"""One file a metric. Each value comes with an interval over splits, and with the real data's own value beside it."""
