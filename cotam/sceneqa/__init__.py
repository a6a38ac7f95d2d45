"""SceneQA: rendered scenes with questions at three levels, the built-in task."""
