"""The paper's tables and figures as recipes, made again with its numbers beside ours."""
