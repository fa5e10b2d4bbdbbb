"""The pure-step core: primitives, rules, the gradient engine, state, values and steps."""
