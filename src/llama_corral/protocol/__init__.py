"""What travels between the parts: messages, records, the life of a task, topics. Pure: no I/O, no clock."""
