"""The optimizer that owns the step, the exact local quadratic model, and what a step refuses."""
