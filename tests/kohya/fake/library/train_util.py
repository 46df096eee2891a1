def verify_command_line_training_args(args):
    pass
