"""From yml files and the command line to checked settings: student, teacher, distillation."""
