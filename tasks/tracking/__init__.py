"""MLflow tracking: journals of events, their delivery, runs, models and plots."""
