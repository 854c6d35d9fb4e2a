"""How good a model is: bits per byte, baselines, needles in long text, a cage for its programs."""
