"""The real world behind the decisions: agent, worker processes, measurements of this device."""
