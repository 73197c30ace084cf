"""What a run shows and keeps: metrics, timers, progress, plots, saved rollouts, logs, summary."""
