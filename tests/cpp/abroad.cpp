// abroad ENGINE: the self-test, in a process whose locale writes one half as 0,5 and a thousand as 1.000.
#include <ztp/session.h>

#include <iostream>
#include <locale>

namespace {

class Comma final : public std::numpunct<char> {
  char do_decimal_point() const override { return ','; }
  char do_thousands_sep() const override { return '.'; }
  std::string do_grouping() const override { return "\3"; }
};

}  // namespace

int main(int, char** words) {
  std::locale::global(std::locale(std::locale::classic(), new Comma));
  try {
    const ztp::Session session(words[1]);
    std::cout << session.self_test().images << " images\n";
    return 0;
  } catch (const ztp::Error& error) {
    std::cerr << error.problem() << '\n';
    return error.exit_code();
  }
}
