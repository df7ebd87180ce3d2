//! `kvctl completion`: scripts for bash, zsh and fish.

use clap::{Args, CommandFactory as _, ValueEnum};
use clap_complete::Shell;

use crate::cli::Cli;
use crate::exit::{Exit, Failure};
use crate::out;

const EXAMPLE: &str = "Example: kvctl completion bash > /etc/bash_completion.d/kvctl";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct Arguments {
    /// Which shell
    #[arg(value_enum)]
    shell: Which,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Which {
    Bash,
    Zsh,
    Fish,
}

pub(crate) fn run(arguments: &Arguments) -> Result<Exit, Failure> {
    out::print(&script(arguments.shell))?;
    Ok(Exit::Ok)
}

fn script(which: Which) -> String {
    let shell = match which {
        Which::Bash => Shell::Bash,
        Which::Zsh => Shell::Zsh,
        Which::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    // Hidden in help for the sake of room, not here.
    let mut command = Cli::command().mut_args(|argument| argument.hide(false));
    clap_complete::generate(shell, &mut command, "kvctl", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shell_gets_a_script_that_knows_the_commands() {
        for which in [Which::Bash, Which::Zsh, Which::Fish] {
            let script = script(which);
            assert!(
                ["kvctl", "status", "doctor", "no-headers", "endpoint"]
                    .iter()
                    .all(|word| script.contains(word))
            );
        }
    }
}
