//! `kvctl options`: the page of what every command takes.

use clap::CommandFactory as _;

use crate::cli::Cli;
use crate::exit::{Exit, Failure};
use crate::out;

pub(crate) fn run() -> Result<Exit, Failure> {
    out::print(&page())?;
    Ok(Exit::Ok)
}

const ENDS: &str = "
Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 4 degraded, 5 unreachable,
6 denied. Colour: only on a terminal; NO_COLOR and CLICOLOR_FORCE are obeyed.
";

fn page() -> String {
    let command = Cli::command();
    let mut text = String::from("Every command takes these:\n\n");
    let mut variables = Vec::new();
    for argument in command.get_arguments().filter(|argument| argument.is_global_set()) {
        let flag = format!("--{} {}", argument.get_id().as_str().replace('_', "-"), value_name(argument));
        variables.extend(argument.get_env().map(|name| name.to_string_lossy().into_owned()));
        text += &format!("  {flag:20} {}\n", argument.get_help().unwrap_or_default());
    }
    text + "\nIn the environment: " + &variables.join(", ") + ".\n" + ENDS
}

fn value_name(argument: &clap::Arg) -> String {
    argument.get_value_names().map_or_else(String::new, |names| names.join(" "))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_page_fits_and_names_every_global_option() {
        let page = super::page();
        for flag in ["--endpoint WHERE", "--timeout", "--tls-ca", "--tls-cert", "--tls-key", "--tls-name"] {
            assert!(page.contains(flag), "{flag}\n{page}");
        }
        assert!(page.lines().count() < 24 && page.lines().all(|line| line.chars().count() <= 80), "{page}");
    }
}
