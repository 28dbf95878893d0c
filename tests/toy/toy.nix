# Stands in for NixOS: from toy.json to config.system.build.toplevel, for each of its hosts.
let
  all = builtins.fromJSON (builtins.readFile ./toy.json);
  PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

  # By content alone: a path below a flake would drag the whole flake in as an input.
  file = path: builtins.toFile (baseNameOf path) (builtins.readFile path);

  # A directory with one file, as long as a kernel is for a toy: a copy of it that is cut short shows.
  image = toy: name: file: line:
    derivation {
      inherit name PATH;
      system = toy.platform or "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-c" "mkdir $out && cp $text $out/${file}" ];
      text = builtins.toFile file (builtins.concatStringsSep "" (builtins.genList (_: "${line}\n") 600) + "whole\n");
    };

  broken = toy: derivation {
    inherit PATH;
    name = toy.dependency or "firefox-132.0";
    system = toy.platform or "x86_64-linux";
    builder = "/bin/sh";
    args = [ "-c" "echo 'checking the toy compiler... yes'; echo \"toy.c:7: undefined reference to 'everything'\"; exit 2" ];
  };

  toplevel = host: toy:
    let kernel = toy.kernel or "6.12"; in
    derivation {
      inherit PATH;
      name = "nixos-system-${host}-${toy.label or "v1"}";
      system = toy.platform or "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-c" "exec \"\${python:-python3}\" -I ${file ./toy_system.py}" ];
      toy = builtins.toJSON toy;
      python = toy.python or "";
      kernel = "${image toy "linux-${kernel}" "bzImage" "linux ${kernel}"}/bzImage";
      initrd = "${image toy "initrd-linux-${kernel}" "initrd" "initrd-linux ${kernel}"}/initrd";
      modules = image toy "linux-${kernel}-modules" "modules.order" "modules ${kernel}";
      dependency = if toy.build or "" == "dependency" then broken toy else "";
      specialisations = builtins.toJSON (builtins.mapAttrs
        (_: overrides: "${toplevel host (builtins.removeAttrs toy [ "specialisations" ] // overrides)}")
        (toy.specialisations or { }));
      client =
        if builtins.pathExists ./utils/bento_client.py then file ./utils/bento_client.py else toy.client or "";
      # Any change of the configuration makes a new system, unless it is "pure".
      source = if toy.pure or false then "" else builtins.path { path = ./.; name = "source"; };
    };

  system = host: overrides:
    let toy = builtins.removeAttrs all [ "hosts" ] // overrides; in
    {
      config.system.build.toplevel =
        if toy.build or "ok" == "eval-error" then throw "The option `services.toy' does not exist."
        else if toy.build or "ok" == "assertions" then
          throw "\nFailed assertions:\n${builtins.concatStringsSep "\n" (map (text: "- ${text}") (toy.assertions or [ "it does not hold" ]))}"
        else toplevel host toy;
    };
in
builtins.mapAttrs system all.hosts
