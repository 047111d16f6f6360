"""What SonoEdge is measured against: each in a process of its own, and in its own environment if it needs one."""
