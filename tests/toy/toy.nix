# Stands in for NixOS: from toy.json to config.system.build.toplevel, for each of its hosts.
let
  all = builtins.fromJSON (builtins.readFile ./toy.json);

  # By content alone: a path below a flake would drag the whole flake in as an input.
  file = path: builtins.toFile (baseNameOf path) (builtins.readFile path);

  system = host: overrides:
    let
      toy = builtins.removeAttrs all [ "hosts" ] // overrides;
      linux = part: builtins.toFile "${part}-${toy.kernel or "6.12"}" "${part} ${toy.kernel or "6.12"}\n";
      toplevel = derivation {
        name = "nixos-system-${host}-${toy.label or "v1"}";
        system = toy.platform or "x86_64-linux";
        builder = "/bin/sh";
        args = [ "-c" "exec \"\${python:-python3}\" -I ${file ./toy_system.py}" ];
        PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        toy = builtins.toJSON toy;
        python = toy.python or "";
        kernel = linux "linux";
        initrd = linux "initrd-linux";
        modules = linux "linux-modules";
        client =
          if builtins.pathExists ./utils/bento_client.py then file ./utils/bento_client.py else toy.client or "";
        # Any change of the configuration makes a new system, unless it is "pure".
        source = if toy.pure or false then "" else builtins.path { path = ./.; name = "source"; };
      };
    in
    {
      config.system.build.toplevel =
        if toy.build or "ok" == "eval-error" then throw "The option `services.toy' does not exist." else toplevel;
    };
in
builtins.mapAttrs system all.hosts
