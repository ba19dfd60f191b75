"""Training N:M sparse networks with nmjax: tasks, methods, and how they compare."""
