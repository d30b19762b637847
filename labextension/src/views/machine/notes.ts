/** What a person should know of a machine before believing its numbers, a sentence each. */

import type { Translate } from '../../i18n'
import { formatBytes } from '../../units'
import type { MachineState } from '../../wire'
import { WORTH_SAYING_BYTES } from './facts'

/** The same notes as `llm_magic/views/machine.py` writes. */
export function notes(state: MachineState, t: Translate): string[] {
  const gpus = state.devices.filter(device => device.kind === 'gpu')
  const npus = state.devices.filter(device => device.kind === 'npu')
  const busy = gpus.filter(device => device.other >= WORTH_SAYING_BYTES && !device.unified)
  return [
    ...busy.map(device => t('machineNoteOther', { size: formatBytes(device.other), device: device.id })),
    ...gpus.filter(device => device.unified).map(device => t('machineNoteUnified', { device: device.id })),
    ...(gpus.length ? [] : [t('machineNoteNoGpu')]),
    ...npus.map(device => t('machineNoteNpu', { device: device.id, name: device.name })),
    ...assumed(state, t),
  ]
}

function assumed(state: MachineState, t: Translate): string[] {
  const devices = state.devices.filter(device => device.assumed.length)
  if (!devices.length && !state.links.some(link => link.assumed)) return []
  const sources = [...new Set(devices.filter(device => device.assumed.includes('read')).map(device => device.method))]
  const named = sources.filter(Boolean).sort().join(', ')
  const note = named ? t('machineNoteAssumedBy', { sources: named }) : t('machineNoteAssumed')
  return [state.described ? note : `${note} ${t('machineNoteMeasure')}`]
}
