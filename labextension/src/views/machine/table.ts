/** The same as tables: for screen readers, and for everybody who wants to read the numbers off. */

import { h } from '../../dom'
import type { Translate } from '../../i18n'
import { formatBytes } from '../../units'
import type { MachineState } from '../../wire'
import {
  flopsWords, freeWords, kindWords, linkSourceWords, placeWords, readWords, sourceWords, speedWords, totalWords, WORTH_SAYING_BYTES,
} from './facts'
import { timeWords } from './labels'
import type { Path } from './path'
import { wayWords } from './steps'

export function tables(state: MachineState, path: Path, t: Translate): HTMLElement[] {
  return [deviceTable(state, t), linkTable(state, t), stepTable(state, path, t)].filter(found => found !== null)
}

function deviceTable(state: MachineState, t: Translate): HTMLElement {
  const head = [
    t('machineColumnDevice'), t('machineColumnKind'), t('machineColumnName'), t('machineColumnFree'), t('machineColumnTotal'),
    t('machineColumnOther'), t('machineColumnReads'), t('machineColumnComputes'), t('machineColumnSource'),
  ]
  const rows = state.devices.map(device => [
    device.id, kindWords(device, t), device.name, freeWords(device), totalWords(device),
    device.other >= WORTH_SAYING_BYTES ? formatBytes(device.other) : '', readWords(device),
    device.kind === 'npu' ? t('machineNamedOnly') : flopsWords(device), sourceWords(device, t),
  ])
  return table(t('machineDevices'), head, rows)
}

function linkTable(state: MachineState, t: Translate): HTMLElement | null {
  if (!state.links.length) return null
  const head = [t('machineColumnLink'), t('machineColumnSpeed'), t('machineColumnOver'), t('machineColumnSource')]
  const rows = state.links.map(link => [
    t('machineHop', { source: placeWords(link.source, state, t), target: placeWords(link.target, state, t) }),
    speedWords(link, t), link.name, linkSourceWords(link, t),
  ])
  return table(t('machineLinks'), head, rows)
}

function stepTable(state: MachineState, path: Path, t: Translate): HTMLElement | null {
  if (!path.steps.length) return null
  const head = [t('machineColumnStep'), t('machineColumnWay'), t('machineColumnBytes'), t('machineColumnTime')]
  const rows = path.steps.map(step => [
    String(step.number), wayWords(step, state, t), formatBytes(step.bytes),
    path.limiting.includes(step) ? `${timeWords(step.seconds, t)} (${t('machineSetsPace')})` : timeWords(step.seconds, t),
  ])
  return table(t('machinePath'), head, rows)
}

function table(caption: string, head: string[], rows: string[][]): HTMLElement {
  const line = ([first = '', ...others]: string[]) =>
    h('tr', {}, h('th', { scope: 'row' }, first), ...others.map(text => h('td', { class: 'num' }, text)))
  const made = h('table', {}, h('caption', {}, caption),
    h('thead', {}, h('tr', {}, ...head.map(text => h('th', { scope: 'col' }, text)))),
    h('tbody', {}, ...rows.map(line)))
  return h('div', { class: 'mv-scroll', tabindex: 0, role: 'group', 'aria-label': caption }, made)
}
